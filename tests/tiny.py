"""Tiny random models of every supported architecture; importable without pytest, for tests in other processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 99
WIDTH = 32
BLOCKS = 2

Inputs = dict[str, Tensor]

_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 24,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def text(rows: int = 2, length: int = 7, seed: int = 0) -> Inputs:
    """Random tokens; the last row is padded by two."""
    ids = torch.randint(3, VOCABULARY - 9, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sequence_to_sequence(rows: int = 2) -> Inputs:
    inputs = text(rows)
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :5]}


def pixels(rows: int = 2) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def sound(rows: int = 2) -> Inputs:
    features = torch.randn(rows, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": text(rows)["input_ids"]}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model and what the library is expected to find in it.

    Args:
        make: a new model with random weights.
        inputs: of its forward pass.
        matrices: factorizable matrices in its Transformer blocks.
        ratio: of bytes in the blocks, that its plan can meet; 2 but for models whose experts stay dense.
        auto: the class through which a user would load it.
    """

    make: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    matrices: int
    auto: type
    ratio: float = 2.0

    def build(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.make().eval()


MODELS: dict[str, Tiny] = {
    "bert": Tiny(
        lambda: tf.BertForMaskedLM(tf.BertConfig(**_ENCODER)),
        text,
        matrices=6 * BLOCKS,
        auto=tf.AutoModelForMaskedLM,
    ),
    "roberta": Tiny(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER, num_labels=3)),
        text,
        matrices=6 * BLOCKS,
        auto=tf.AutoModelForSequenceClassification,
    ),
    "distilbert": Tiny(
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(
                dim=WIDTH,
                n_layers=BLOCKS,
                n_heads=4,
                hidden_dim=64,
                vocab_size=VOCABULARY,
                max_position_embeddings=24,
            )
        ),
        text,
        matrices=6 * BLOCKS,
        auto=tf.AutoModelForMaskedLM,
    ),
    "albert": Tiny(
        lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**_ENCODER, embedding_size=16)),
        text,
        matrices=6,
        auto=tf.AutoModelForMaskedLM,
    ),
    "gpt2": Tiny(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                n_embd=WIDTH,
                n_layer=BLOCKS,
                n_head=4,
                n_positions=24,
                vocab_size=VOCABULARY,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        text,
        matrices=4 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
    ),
    "opt": Tiny(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                hidden_size=WIDTH,
                word_embed_proj_dim=WIDTH,
                num_hidden_layers=BLOCKS,
                num_attention_heads=4,
                ffn_dim=64,
                vocab_size=VOCABULARY,
                max_position_embeddings=24,
            )
        ),
        text,
        matrices=6 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
    ),
    "llama": Tiny(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)),
        text,
        matrices=7 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
    ),
    "llama-tied": Tiny(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
        text,
        matrices=7 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
    ),
    "qwen3": Tiny(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER, head_dim=8)),
        text,
        matrices=7 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
    ),
    "t5": Tiny(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=WIDTH,
                d_kv=8,
                d_ff=64,
                num_layers=BLOCKS,
                num_heads=4,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
            )
        ),
        sequence_to_sequence,
        matrices=(6 + 10) * BLOCKS,
        auto=tf.AutoModelForSeq2SeqLM,
    ),
    "vit": Tiny(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=BLOCKS,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            )
        ),
        pixels,
        matrices=6 * BLOCKS,
        auto=tf.AutoModelForImageClassification,
    ),
    "whisper": Tiny(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                d_model=WIDTH,
                encoder_layers=BLOCKS,
                decoder_layers=BLOCKS,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                vocab_size=VOCABULARY,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=24,
                pad_token_id=1,
                bos_token_id=1,
                eos_token_id=1,
                decoder_start_token_id=1,
            )
        ),
        sound,
        matrices=(6 + 10) * BLOCKS,
        auto=tf.AutoModelForSpeechSeq2Seq,
    ),
    "modernbert": Tiny(
        lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(
                **_ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
            )
        ),
        text,
        matrices=4 * BLOCKS,
        auto=tf.AutoModelForMaskedLM,
    ),
    "mixtral": Tiny(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_DECODER, num_local_experts=4)),
        text,
        matrices=4 * BLOCKS,
        auto=tf.AutoModelForCausalLM,
        ratio=1.05,
    ),
}


def logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Predictions of a model in evaluation mode."""
    with torch.inference_mode():
        return model(**inputs).logits.clone()
