"""Talking to a trained model: in the terminal, and over HTTP in OpenAI's form."""
