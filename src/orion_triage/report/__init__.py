"""Tables and documents rendered from results.json."""
