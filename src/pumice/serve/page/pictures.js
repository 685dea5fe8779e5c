// Turns picture files into data URIs for the server, and scales large ones down.

const LARGEST_SIDE = 2048; // pixels; no vision tower sees more
const LARGEST_FILE = 3 << 20; // bytes
const UNCHANGED_TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif"];

/** Return {url, name, width, height} for a picture's file. Throws an Error with a message for the user. */
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture that this browser can open. JPEG, PNG and WebP always work.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
  const unchanged = scale === 1 && file.size <= LARGEST_FILE && UNCHANGED_TYPES.includes(file.type);
  const url = await dataUri(unchanged ? file : await scaled(bitmap, scale));
  bitmap.close();
  return { url, name: file.name || "picture", width, height };
}

async function scaled(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // transparent pixels become white, as on the server
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read."));
    reader.readAsDataURL(blob);
  });
}
