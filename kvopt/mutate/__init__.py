"""Other wordings of the template: rules and generators that write them, what makes one valid, and the search."""
