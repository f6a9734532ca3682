"""What a run leaves: checkpoint, report and model card, and what it needs to go on."""
