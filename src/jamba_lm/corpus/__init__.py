"""Files of text into a folder of tokens: read, filtered, without duplicates, and read back."""
