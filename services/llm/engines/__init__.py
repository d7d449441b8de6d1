"""What runs the language model."""
