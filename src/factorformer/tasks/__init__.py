"""What models are trained and measured on: labelled rows, plain text, pairs of texts."""
