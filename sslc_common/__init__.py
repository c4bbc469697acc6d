"""What every package here shares and nothing more: errors for users, whole files, and what the storage format fixes."""
