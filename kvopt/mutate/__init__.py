"""Other wordings of the template: operators, generators, what makes a mutation valid, the search for them."""
