"""The demo: a small model that this package trains itself, and the text it is captured on."""
