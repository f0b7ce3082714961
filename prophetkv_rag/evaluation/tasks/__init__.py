"""Quality tasks: where prompts come from, and how answers are marked."""
