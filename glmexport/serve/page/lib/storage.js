/** localStorage, or memory where the browser forbids it. @returns {{storage: Storage, lasting: boolean}} */
export function openStorage() {
  try {
    const storage = window.localStorage;
    const probe = "glmexport.probe";
    storage.setItem(probe, "");
    storage.removeItem(probe);
    return { storage, lasting: true };
  } catch (error) {
    const full = error instanceof DOMException && error.name === "QuotaExceededError";
    if (full) return { storage: window.localStorage, lasting: true };
    return { storage: /** @type {any} */ (new MemoryStorage()), lasting: false };
  }
}

class MemoryStorage {
  /** @type {Map<string, string>} */
  #items = new Map();

  get length() {
    return this.#items.size;
  }

  /** @param {number} index */
  key(index) {
    return [...this.#items.keys()][index] ?? null;
  }

  /** @param {string} key */
  getItem(key) {
    return this.#items.get(key) ?? null;
  }

  /** @param {string} key @param {string} value */
  setItem(key, value) {
    this.#items.set(key, value);
  }

  /** @param {string} key */
  removeItem(key) {
    this.#items.delete(key);
  }
}
