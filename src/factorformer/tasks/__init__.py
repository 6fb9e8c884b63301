"""What models are trained and measured on: labelled rows, plain text, pairs of texts. Needs `factorformer[train]`."""

from factorformer.errors import require

require("train")
