"""The Hugging Face Hub as a place to read from and write to. Nothing else imports huggingface_hub."""
