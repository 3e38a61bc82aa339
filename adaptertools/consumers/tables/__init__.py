"""One file a consumer: data first, every rule with its version and its source."""
