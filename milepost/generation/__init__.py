"""From a model, a tokenizer and a prompt to text: sampling, fast decoding, streaming."""
