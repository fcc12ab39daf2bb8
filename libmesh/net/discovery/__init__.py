"""How members of one mesh find each other without being told where they are."""
