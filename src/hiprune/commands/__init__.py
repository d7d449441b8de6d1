"""The commands of `hiprune`, a module each, thin skins over the client and the stack. See `cli`."""
