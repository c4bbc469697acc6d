"""What every package here shares and nothing more: errors written for users, and files that are whole or absent."""
