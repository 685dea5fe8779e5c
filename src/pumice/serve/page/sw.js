// Caches the page's files, so that a reload shows the conversation while the server is away.
// A cached file is used only when the server does not answer.

const CACHE_NAME = "pumice-page";
const FILES = ["/", "/page/style.css", "/page/app.js", "/page/api.js", "/page/store.js", "/page/pictures.js",
  "/page/boxes.js", "/page/markdown.js", "/page/explain.js", "/page/explain.css", "/page/icon.svg"];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE_NAME).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  const isPageFile = origin === self.location.origin && (pathname === "/" || pathname.startsWith("/page/"));
  if (event.request.method !== "GET" || !isPageFile) return;
  event.respondWith((async () => {
    const cache = await caches.open(CACHE_NAME);
    try {
      const response = await fetch(event.request);
      if (response.ok) await cache.put(event.request, response.clone());
      return response.status < 500 ? response : (await cache.match(event.request)) ?? response;
    } catch (error) {
      const cached = await cache.match(event.request);
      if (cached) return cached;
      throw error;
    }
  })());
});
