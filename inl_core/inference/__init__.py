"""What a trained model is used for: scores and text."""
