"""Publish a checkpoint on the Hugging Face hub: what may be public of it, a model card made from its record, the upload."""
