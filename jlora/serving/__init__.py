"""``jlora serve``: one base model and many adapters behind the OpenAI protocol."""
