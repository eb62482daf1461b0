"""What a run writes, shows and remembers; whatever watches a run is a listener, and lives here or in pictures."""
