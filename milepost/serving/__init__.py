"""Checkpoints over HTTP, in the form of OpenAI's API: requests as data, the thread that generates, replies and routes."""
