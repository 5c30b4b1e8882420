"""What to remove and when: criteria, schedules, masks."""
