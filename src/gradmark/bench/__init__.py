"""The benchmark: task x scheme x attack x seed, resumable, local or on Ray; ``gradmark bench`` runs it."""
