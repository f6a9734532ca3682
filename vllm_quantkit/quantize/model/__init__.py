"""What is known of model families, and models whose weights stay in their files."""
