"""All that touches the user's model and optimizer, and takes everything off again."""
