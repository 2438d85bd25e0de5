-- Run by the postgres image when its volume is new: a role and a database for Label Studio and for our backend.
-- Neither role is a superuser, and the superuser itself is left without a password: it gets in only from inside the container.
\getenv password POSTGRES_PASSWORD
CREATE ROLE label_studio LOGIN PASSWORD :'password';
CREATE DATABASE label_studio OWNER label_studio ENCODING 'UTF8' TEMPLATE template0;
CREATE ROLE tsp LOGIN PASSWORD :'password';
CREATE DATABASE tsp OWNER tsp ENCODING 'UTF8' TEMPLATE template0;
ALTER ROLE postgres PASSWORD NULL;
