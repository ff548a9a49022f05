"""Plain causal language models in Hugging Face directories."""
