"""READ as a method of peft."""
