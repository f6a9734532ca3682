"""What a quantised model says of text, beside its 16-bit original."""
