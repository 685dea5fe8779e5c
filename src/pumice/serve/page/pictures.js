// From files to data URIs that the server takes: small ones as they are, large ones scaled down.

const LARGEST_SIDE = 2048; // pixels; more is not seen by any vision tower
const LARGEST_FILE = 3 << 20; // bytes
const AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp", "image/gif"];

/** {url, name, width, height} of a picture's file; throws an Error with a sentence for people. */
export async function read(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture that this browser can open. JPEG, PNG and WebP always work.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
  const small = scale === 1 && file.size <= LARGEST_FILE && AS_THEY_ARE.includes(file.type);
  const url = await dataUri(small ? file : await scaled(bitmap, scale));
  bitmap.close();
  return { url, name: file.name || "picture", width, height };
}

async function scaled(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // what is transparent becomes white, as on the server
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
