"""What a format is too long to hold in one file, or several formats share: configurations, trees, key grammars."""
