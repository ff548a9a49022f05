"""One LoRA adapter, as PEFT saves it."""
