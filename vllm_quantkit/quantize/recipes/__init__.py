"""What to do with each layer, as a user says it and as it is done."""
