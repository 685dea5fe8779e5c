// Storage across reloads: the conversation in IndexedDB, since pictures are large, and settings in localStorage.
// Without these, the page works, but a reload loses everything.

const NAME = "pumice";
let databasePromise;

function database() {
  databasePromise ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("kept");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return databasePromise;
}

async function transact(mode, operation) {
  try {
    const db = await database();
    return await new Promise((resolve, reject) => {
      const transaction = db.transaction("kept", mode);
      const request = operation(transaction.objectStore("kept"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch {
    return undefined; // private windows may refuse storage
  }
}

export const loadConversation = () => transact("readonly", (store) => store.get("conversation"));
export const saveConversation = (value) => transact("readwrite", (store) => store.put(value, "conversation"));

export function loadChoice(name) {
  try { return localStorage.getItem(`${NAME}.${name}`); } catch { return null; }
}

export function saveChoice(name, value) {
  try {
    if (value === "" || value === null) localStorage.removeItem(`${NAME}.${name}`);
    else localStorage.setItem(`${NAME}.${name}`, value);
  } catch { /* as above */ }
}
