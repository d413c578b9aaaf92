"""What goes to the Hub: adapters in both key formats, cards, and the upload."""
