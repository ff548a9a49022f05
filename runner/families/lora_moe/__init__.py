"""Mixtures of LoRA experts under a router (DyLoRA-MoE)."""
