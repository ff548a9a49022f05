"""GPTs as modded-nanogpt trains them."""
