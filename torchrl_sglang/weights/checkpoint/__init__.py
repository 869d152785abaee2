"""What the servers' checkpoint promises: tensor headers, coverage and values. May import: errors, config."""
