"""What was measured, kept beside the checkpoint and shown as Markdown and HTML."""
