"""What all chat routes share: a conversation in, messages of the assistant out."""
