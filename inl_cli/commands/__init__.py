"""The commands, a module a group; each a plain typed function that imports the core inside its body."""
