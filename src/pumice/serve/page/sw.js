// Keeps the page's files, so that a reload shows the conversation while the server is away.
// The server comes first: what is kept is only used when it does not answer.

const KEPT = "pumice-page";
const FILES = ["/", "/page/style.css", "/page/app.js", "/page/api.js", "/page/store.js", "/page/pictures.js",
  "/page/markdown.js", "/page/explain.js", "/page/explain.css", "/page/icon.svg"];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  const ours = origin === self.location.origin && (pathname === "/" || pathname.startsWith("/page/"));
  if (event.request.method !== "GET" || !ours) return;
  event.respondWith((async () => {
    const cache = await caches.open(KEPT);
    try {
      const fresh = await fetch(event.request);
      if (fresh.ok) await cache.put(event.request, fresh.clone());
      return fresh.status < 500 ? fresh : (await cache.match(event.request)) ?? fresh;
    } catch (error) {
      const kept = await cache.match(event.request);
      if (kept) return kept;
      throw error;
    }
  })());
});
