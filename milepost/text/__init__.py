"""Text on its way to the model: corpus -> scan -> tokenization -> token_files -> batches."""
