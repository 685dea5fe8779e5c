// What survives a reload: the conversation in IndexedDB (pictures are large), choices in localStorage.
// Where a browser offers neither, everything lives as long as the page.

const NAME = "pumice";
let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("kept");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function kept(mode, act) {
  try {
    const db = await database();
    return await new Promise((resolve, reject) => {
      const transaction = db.transaction("kept", mode);
      const request = act(transaction.objectStore("kept"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } catch {
    return undefined; // private windows may refuse; the page works on without a memory
  }
}

export const loadConversation = () => kept("readonly", (store) => store.get("conversation"));
export const saveConversation = (value) => kept("readwrite", (store) => store.put(value, "conversation"));

export function loadChoice(name) {
  try { return localStorage.getItem(`${NAME}.${name}`); } catch { return null; }
}

export function saveChoice(name, value) {
  try {
    if (value === "" || value === null) localStorage.removeItem(`${NAME}.${name}`);
    else localStorage.setItem(`${NAME}.${name}`, value);
  } catch { /* as above */ }
}
