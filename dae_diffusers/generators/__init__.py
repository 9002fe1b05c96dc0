"""What the transformer generates from, what it learns to predict, and the weights that it starts from."""
