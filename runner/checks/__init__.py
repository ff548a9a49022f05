"""What the test tiers run."""
