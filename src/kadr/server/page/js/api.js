/** Requests to the server's public API, and the token that it may ask for. */

import {store} from "./state.js";

const TOKEN = "kadr.token";
const HEX = Array.from({length: 256}, (_, byte) => byte.toString(16).padStart(2, "0"));

/** An error of the API. status: 0 where the server could not be reached. code, param: as the API has them. */
class ApiError extends Error {
	constructor(status, error = {}, retryAfter = null) {
		super(error.message ?? (status === 0 ? "The server cannot be reached." : `The server answered ${status}.`));
		Object.assign(this, {status, code: error.code, param: error.param, retryAfter});
	}
}

/** Keeps a token for this tab. */
export function setToken(token) {
	sessionStorage.setItem(TOKEN, token);
}

/** Returns the headers that a request needs. */
export function authorization() {
	const token = sessionStorage.getItem(TOKEN);
	return token === null ? {} : {authorization: `Bearer ${token}`};
}

/** Sends a request and returns its response. Throws an `ApiError`; "AbortError" where signal ended it. */
export async function send(method, path, {body, headers = {}, signal} = {}) {
	const isJson = body !== undefined && !(body instanceof Blob);
	const response = await fetch(path, {
		method,
		signal,
		headers: {...authorization(), ...(isJson ? {"content-type": "application/json"} : {}), ...headers},
		body: isJson ? JSON.stringify(body) : body
	}).catch((error) => {
		throw error.name === "AbortError" ? error : new ApiError(0);
	});
	if (response.ok) return response;
	throw await asError(response);
}

/** Sends a request and returns the JSON of its answer. */
export async function call(method, path, options) {
	return (await send(method, path, options)).json();
}

/** Returns the error of a response, and asks for a token where that is what is missing. */
export async function asError(response) {
	if (response.status === 401) store.set({isTokenAsked: true});
	const answer = await response.json().catch(() => ({}));
	return new ApiError(response.status, answer.error, Number(response.headers.get("retry-after")) || null);
}

/** Uploads a file. onProgress: called with the share that is sent, 0 to 1. */
export function upload(file, onProgress = () => {}) {
	return new Promise((resolve, reject) => {
		const request = new XMLHttpRequest(); // fetch does not tell how much of a body is sent
		request.open("POST", "/v1/uploads");
		request.responseType = "json";
		for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
		request.setRequestHeader("content-type", "application/octet-stream");
		request.upload.onprogress = (event) => onProgress(event.loaded / Math.max(event.total, 1));
		request.onerror = () => reject(new ApiError(0));
		request.onload = () => {
			if (request.status === 200) return resolve(request.response);
			if (request.status === 401) store.set({isTokenAsked: true});
			return reject(new ApiError(request.status, request.response?.error));
		};
		request.send(file);
	});
}

/** Returns the address of a signed file on whatever name of the server this page came from. */
export function local(url) {
	const {pathname, search} = new URL(url);
	return pathname + search;
}

/** Returns a random number of 32 bits. */
export function randomSeed() {
	return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Returns a key that makes it safe to send a request again. (`randomUUID` is only there on https.) */
export function randomKey() {
	return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => HEX[byte]).join("");
}
