// What every script needs: the server's address, a key, the model's name, and a picture.
import { readFileSync } from "node:fs";

export const HOST = process.env.PUMICE_HOST;
export const KEY = "none";
export const MODEL = "pumice-tiny";
export const DOG = readFileSync(process.env.PUMICE_DOG);
export const PICTURE = `data:image/jpeg;base64,${DOG.toString("base64")}`;
