def find(path):
    return None
