"""Text on its way to the model: corpus -> tokenization -> tokens -> batches."""
